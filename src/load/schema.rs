//! JSON Schemas of whole documents.
