"""The three networks of Stable Diffusion v1, with the keys of its published .ckpt files."""
