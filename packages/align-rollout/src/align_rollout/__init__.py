"""Generation with vLLM and live, verified weight updates."""
