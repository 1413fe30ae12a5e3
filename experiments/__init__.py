"""Tables of quality: samplers, guidance, numbers of steps."""
