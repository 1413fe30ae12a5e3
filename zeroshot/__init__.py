"""What p3_clip_zeroshot.py is made of: loading CLIP and its data, and the evidence it writes."""
