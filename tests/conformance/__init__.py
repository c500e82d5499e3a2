"""What any scaled dot-product attention can be asked to get right, and a table of who does.

`python -m tests.conformance` prints the table; tests/test_conformance.py holds this package's attention to it.
"""
