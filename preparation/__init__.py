"""What prepare_data.py does: drawing, downloading, checking and laying out the data."""
