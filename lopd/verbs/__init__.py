"""The verbs of the command line: what a user types after `lopd`.

Each file has one family of verbs. A verb reads its options, calls the package that does the work,
and prints the result. lopd/cli.py joins the verbs.
"""
