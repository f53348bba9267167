"""The HTTP application: OpenAI's videos API, events, and what operations need. It runs nothing itself."""
