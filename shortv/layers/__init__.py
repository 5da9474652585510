"""How is work skipped? The reference executor, slow and obviously right."""
