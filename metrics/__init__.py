"""What evaluate.py measures, one module for each kind of score."""
