//! Generates `wsproxy_proto::rooms::v1` from `spec/rooms/v1/rooms.proto`, or checks that it is current.

use std::error::Error;
use std::path::Path;
use std::{env, fs};

fn main() -> Result<(), Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../..");
    let target = root.join("crates/wsproxy-proto/src/rooms/v1.rs");
    let scratch = env::temp_dir().join(format!("wsproxy-codegen-{}", std::process::id()));
    fs::create_dir_all(&scratch)?;
    let generated = generate(&root.join("spec/rooms/v1"), &scratch);
    fs::remove_dir_all(&scratch)?;
    let generated = generated?;
    if !env::args().any(|argument| argument == "--check") {
        fs::write(&target, generated)?;
    } else if fs::read_to_string(&target)? != generated {
        return Err("src/rooms/v1.rs is not what spec/rooms/v1/rooms.proto gives. Run this without --check.".into());
    }
    Ok(())
}

fn generate(source: &Path, scratch: &Path) -> Result<String, Box<dyn Error>> {
    use protox::prost::Message as _;
    let descriptors = protox::compile(["rooms.proto"], [source])?.encode_to_vec();
    let set = scratch.join("rooms.binpb");
    fs::write(&set, descriptors)?;
    buffa_build::Config::new()
        .descriptor_set(&set)
        .files(&["rooms.proto"])
        .out_dir(scratch)
        .generate_views(false)
        .generate_json(true)
        .preserve_unknown_fields(false)
        .map_type(buffa_build::MapRepr::BTreeMap)
        .file_per_package(true)
        .compile()?;
    let code = fs::read_to_string(scratch.join("wsproxy.rooms.v1.rs"))?;
    // A test of wsproxy-proto compares this line with the file, without the generator.
    let hash = sha1_smol::Sha1::from(fs::read(source.join("rooms.proto"))?).digest();
    Ok(format!("{code}// SHA-1 of rooms.proto: {hash}\n"))
}
