"""Images: sample data, readers, small backbones."""
