"""What the user sees and keeps: console lines, progress, tables, metrics and pictures."""
