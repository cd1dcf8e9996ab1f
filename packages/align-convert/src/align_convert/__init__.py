"""Convert Llama-family checkpoints between Hugging Face and Megatron-core layouts."""
