"""Training: MuonClip, gradients, quantisation-aware training, and the loop around them."""
