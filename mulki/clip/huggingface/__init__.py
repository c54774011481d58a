"""CLIP and SigLIP as transformers has them: names of weights, architectures, reading a folder."""
