"""Facts about models and machines, computed without weights in memory."""
