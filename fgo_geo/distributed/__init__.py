"""What sharded parameters need. Nothing yet."""
