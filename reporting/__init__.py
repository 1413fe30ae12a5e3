"""What report.py reads and the templates it fills."""
