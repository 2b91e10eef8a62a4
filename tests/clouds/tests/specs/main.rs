//! Requests of the brokers conform to the clouds' published API descriptions, except where those
//! are known to be wrong.
//!
//! `specs/README.md` lists their sources and what was left out.

use outliers::cloud::broker::{Broker, GpuRequest};
use outliers::units::Bytes;
use outliers_clouds::conformance::lease;
use outliers_clouds::dialect::runpod::RunPod;
use outliers_clouds::{Dialect, FakeCloud, Request, dialect};

mod openapi;

use openapi::OpenApi;

const SPECS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/specs");

#[tokio::test]
async fn requests_conform_to_the_clouds_openapi() {
    let mut complaints = Vec::new();
    let rest_alone: Box<dyn Dialect> = Box::new(RunPod::rest_alone());
    for dialect in dialect::all().into_iter().chain([rest_alone]) {
        let document = dialect.document().unwrap_or_else(|| panic!("{} has no description", dialect.cloud().name));
        let text = std::fs::read_to_string(format!("{SPECS}/{}", document.file)).expect(document.file);
        let api = OpenApi::parse(&text).expect(document.file);
        let cloud = FakeCloud::boxed(dialect);
        let requests = all_requests(&cloud).await;
        let base = base_path(cloud.dialect());
        let described: Vec<&Request> =
            requests.iter().filter(|request| !document.elsewhere.contains(&request.path.as_str())).collect();
        assert!(described.len() >= 3, "{}: there is something to compare", document.file);
        for request in described {
            let found = api.complaints(request, &base);
            let found = found.into_iter().filter(|complaint| !document.wrong.contains(&complaint.at.as_str()));
            let called = format!("{} {base}{}", request.method, request.path);
            complaints.extend(found.map(|complaint| format!("{called}: {}: {}", complaint.at, complaint.what)));
        }
    }
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

fn base_path(dialect: &dyn Dialect) -> String {
    let (_, host_and_path) = dialect.cloud().base_url.split_once("//").expect("a base URL is a URL");
    host_and_path.find('/').map_or_else(String::new, |at| host_and_path[at..].trim_end_matches('/').to_owned())
}

/// Requests of a broker in the life of an instance, after queries of every kind.
async fn all_requests(cloud: &FakeCloud) -> Vec<Request> {
    let broker = cloud.broker();
    let lease = lease();
    let plain = GpuRequest { gpu_count: Some(1), min_disk: Some(lease.disk), ..GpuRequest::default() };
    let picky = GpuRequest {
        gpu_filter: Some("a100".to_owned()),
        min_vram: Some(Bytes::from_gib(80)),
        min_cpu_ram: Some(Bytes::from_gib(64)),
        max_price: Some(outliers::units::UsdPerHour::from_dollars(3.0)),
        region: Some("us".to_owned()),
        tier: Some(outliers::cloud::broker::Tier::Secure),
        spot: true,
        min_cuda: "12.4".parse().ok(),
        ..plain.clone()
    };
    broker.check().await.expect("the key is good");
    broker.offers(&picky).await.expect("there is an answer");
    let offers = broker.offers(&plain).await.expect("there are offers").offers;
    let offer = offers.iter().find(|offer| !offer.spot).expect("there is an offer");
    let made = broker.create(offer, &lease).await.expect("it can be rented");
    live(&*broker, &made.id).await;
    cloud.state().requests.clone()
}

async fn live(broker: &dyn Broker, id: &outliers::cloud::broker::InstanceId) {
    broker.list().await.expect("it is listed");
    broker.get(id).await.expect("it is shown");
    broker.terminate(id).await.expect("it is ended");
}
