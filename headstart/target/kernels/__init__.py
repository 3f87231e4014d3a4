"""What makes a target fast and repeatable on this machine; chosen behind `Target`, known to nobody else.

Every kernel here has a plain reference (the model's own module, `scaled_dot_product_attention`), is compared with it
when a model is loaded, and is left out where it disagrees or where the torch operation it needs does not exist.
"""
