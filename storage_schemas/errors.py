"""Errors that a person or a script caused and can mend; their message says what, where and how."""


class StoreError(Exception):
    """Something asked of the store cannot be done as asked."""
