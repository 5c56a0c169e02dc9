"""What draws new cases for as long as told, beside the tests."""
