"""Accounts: which key used the GPU, and what it cost. Imported only when `ledger` is set."""
