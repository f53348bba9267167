"""Transition Models (TiM, arXiv 2509.04394) in PyTorch: the text-to-image and the class-conditional network, a jump
from any time t to any earlier time r, and its sampler. One set of weights serves any number of steps.

Released weights load under their own names. What it is not: the text encoder (Gemma) and the decoder (DC-AE, SD-VAE),
which are other people's well-kept models; and the training, which is in `tmd_ref.distill`.
"""
