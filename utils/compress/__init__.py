"""The stages of a recipe, run one after the other as the scripts would run them."""
