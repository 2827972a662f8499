"""The HTTP API: OpenAI's Files and Batches over a store, one question at a time, metrics, and a page to watch."""
