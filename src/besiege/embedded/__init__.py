"""What the package brings along: real images from scikit-learn, and small networks that we trained on them."""
