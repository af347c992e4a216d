"""Torch operators that take long for what their results take up."""

# By which tokens meet matrices. Scores of tokens with tokens, which grow with the square of the length, are bmm.
PRODUCTS = ("mm", "addmm", "_grouped_mm")
FUSED_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)
