"""What a user chooses by name: options, and tables that a user may add to."""
