"""The processes of a run, and what they do together.

This file imports nothing, so that `wait_policy` can go before torch.
"""
