"""The Streamlit explorer over saved runs: the room for its pages."""
