"""Anthropic's Messages API, translated to an OpenAI chat and back."""
