"""What a user types after `lopd`: one file for each family of verbs; lopd/cli.py joins them.
Nothing but options, and calls into the rooms that do the work.
"""
