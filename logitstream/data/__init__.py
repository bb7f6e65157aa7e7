"""Texts and token rows: packing, document borders, masks."""
