"""Recipes: how the models that ship with Headstart were made. Nothing here is imported by the package."""
