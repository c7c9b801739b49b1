"""Speculation that pays: a smaller draft head, and a running choice of the number of drafts."""
