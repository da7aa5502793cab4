"""Between this repository and the Hugging Face Hub: starting points in, results out."""
