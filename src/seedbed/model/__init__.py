"""The decoder: its fields, its parts, and the folders it is read from and written to.

Nothing is imported here, so that `seedbed.model.config` and `seedbed.model.families` stay free of torch.
"""
