"""The multi-LoRA operators: pure routing and the forms that compute (torch only)."""
