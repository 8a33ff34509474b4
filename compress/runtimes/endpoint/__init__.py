"""A server at a URL that speaks the OpenAI API."""
