"""Generation with vLLM and live, verified weight updates. Importing it imports neither torch nor vLLM."""
