"""Accounts: which key used the GPU, and what that took. Nothing in here is imported unless `ledger` is set."""
