"""What a checkpoint computes, on the CPU: by transformers for Hugging Face's, by megatron-core for Megatron's.

Needs `pip install 'align-convert[verify]'`; nothing else in this package does.
"""
