"""What others use to choose K, to compare with. Each module says where it comes from."""
