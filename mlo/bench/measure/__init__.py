"""What is measured: seconds, reverse passes, memory."""
