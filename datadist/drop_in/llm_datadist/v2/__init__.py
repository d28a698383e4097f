"""The second version of the API, which is the only one here."""
