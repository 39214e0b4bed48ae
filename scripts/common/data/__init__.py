"""Reads labelled pictures of any source: folders, zip files, Parquet, NPZ and IDX files."""
