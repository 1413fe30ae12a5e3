"""What p3_textual_inversion.py is made of: tokens, concepts, embeddings, models and scores."""
