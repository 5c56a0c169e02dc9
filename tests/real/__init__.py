"""What holds on a pretrained language model: `make real` fetches it and runs these; `make test` leaves them out."""
