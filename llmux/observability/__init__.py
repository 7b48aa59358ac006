"""What llmux tells the outside about itself: log, metrics, and the state that survives a restart."""
