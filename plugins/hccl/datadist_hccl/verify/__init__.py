"""What a person with two NPUs runs once, to verify the transport on them and keep the report."""
