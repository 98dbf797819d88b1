"""Times and what they were measured on."""
