"""What an attention map is: its formats and bytes, the specification in plain torch, and the ring that holds maps."""
