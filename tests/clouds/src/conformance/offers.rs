//! Offers: in this program's units, at the full price, without any that cannot be compared.

use outliers::cloud::broker::{BrokerErrorKind, GpuRequest, Offer, Offers, Tier};
use outliers::cloud::estimate::Work;
use outliers::cloud::market;
use outliers::units::{Bytes, Usd, UsdPerHour};

use super::{DISK_GIB, find, kind, lease, want};
use crate::{FakeCloud, Op, Stock};

/// GB taken for GiB are off by 7 %; other wrong units by more.
const ROUNDING: f64 = 0.08;

/// Every offer is in this program's units. What its cloud does not report is unknown.
pub async fn are_in_our_units(cloud: &FakeCloud) {
    for stock in shown(cloud).iter().filter(|stock| stock.is_plain()) {
        let offers = offers(cloud, stock, false).await;
        let offer = find(&offers, stock).unwrap_or_else(|| panic!("{stock:?} is offered: {offers:?}"));
        assert_eq!(offer.broker, cloud.dialect().cloud().name);
        assert!(!offer.is_local, "{offer:?}");
        assert_eq!(offer.vram, Some(Bytes::from_gib(stock.gpu.sold_gib())), "as it is sold: {offer:?}");
        assert!(offer.vram_reported.is_none_or(|reported| Some(reported) <= offer.vram), "{offer:?}");
        assert_about(offer.cpu_ram, stock.ram_gib, "memory of the host", offer);
        if let Some(disk) = offer.disk {
            assert_about(Some(disk), Some(stock.disk_gib), "disk", offer);
        }
        assert!(offer.cpu_cores.is_none_or(|cores| cores == stock.cores), "{offer:?}");
        let tier = if stock.secure { Tier::Secure } else { Tier::Community };
        assert!(offer.tier.is_none_or(|told| told == tier), "{offer:?}");
    }
}

/// The price is that of the whole instance, with the requested disk.
pub async fn are_priced_whole(cloud: &FakeCloud) {
    for stock in shown(cloud).iter().filter(|stock| stock.is_plain()) {
        let offers = offers(cloud, stock, false).await;
        let offer = find(&offers, stock).unwrap_or_else(|| panic!("{stock:?} is offered: {offers:?}"));
        let price = cloud.dialect().price(stock, DISK_GIB);
        let apart = offer.price.0.micros().abs_diff(price.0.micros());
        assert!(apart < 1000, "{} is offered, {price} is right: {offer:?}", offer.price);
    }
}

/// Stock that is sold out, priced in another currency or prepaid is not offered; if it is shown, a
/// reason is given.
pub async fn are_what_can_be_had(cloud: &FakeCloud) {
    for stock in shown(cloud).iter().filter(|stock| !stock.is_plain() && !stock.spot) {
        let offers = offers(cloud, stock, true).await;
        assert_eq!(find(&offers, stock), None, "{stock:?}");
        if stock.left > 0 {
            assert!(!offers.dropped.is_empty(), "a reason is given: {stock:?}");
        }
    }
}

/// Interruptible stock is offered only on request, and is marked.
pub async fn may_be_taken_back_only_if_wanted(cloud: &FakeCloud) {
    let spot = cloud.dialect();
    let capable = cloud.broker().capabilities().spot;
    for stock in shown(cloud).iter().filter(|stock| stock.spot) {
        let unasked = offers(cloud, stock, false).await;
        assert!(unasked.offers.iter().all(|offer| !offer.spot), "{unasked:?}");
        let asked = offers(cloud, stock, true).await;
        assert_eq!(find(&asked, stock).is_some(), capable, "{}: {asked:?}", spot.cloud().name);
    }
}

/// A query with filters leaves out no offer that the market would keep.
pub async fn left_out_are_none_that_the_market_keeps(cloud: &FakeCloud) {
    let mut wanted = Vec::new();
    for gpu_filter in [None, Some("H100 SXM"), Some("a100"), Some("rtx 4090")] {
        for (min_cpu_ram, min_vram) in [(None, None), (Some(64), Some(80)), (Some(118), None)] {
            for (region, tier) in [(None, None), (Some("us"), Some(Tier::Secure)), (Some("oslo"), None)] {
                for (max_price, spot, gpus) in [(None, false, 1), (Some(1.95), true, 2), (Some(30.0), false, 8)] {
                    wanted.push(GpuRequest {
                        gpu_count: Some(gpus),
                        gpu_filter: gpu_filter.map(str::to_owned),
                        min_vram: min_vram.map(Bytes::from_gib),
                        min_cpu_ram: min_cpu_ram.map(Bytes::from_gib),
                        max_price: max_price.map(UsdPerHour::from_dollars),
                        region: region.map(str::to_owned),
                        tier,
                        spot,
                        // Some clouds do not report it; the market then keeps none of their
                        // offers.
                        min_cuda: if gpus == 2 { "12.8".parse().ok() } else { None },
                        ..want()
                    });
                }
            }
        }
    }
    let mut kept_of_any = 0;
    for want in wanted {
        // Options that change an offer, without filters.
        let plain = GpuRequest {
            gpu_count: want.gpu_count,
            spot: want.spot,
            min_disk: want.min_disk,
            min_cpu_ram: want.min_cpu_ram.map(|_| Bytes(1)),
            ..GpuRequest::default()
        };
        let all = kept(cloud, &plain, &want).await;
        let asked = kept(cloud, &want, &want).await;
        assert!(all.iter().all(|offer| asked.contains(offer)), "{want:?}: of {all:?} only {asked:?}");
        kept_of_any += all.len();
    }
    assert!(kept_of_any > 0, "the market keeps something");
}

/// The offers that the market keeps for `want` when the broker is queried with `asked`.
async fn kept(cloud: &FakeCloud, asked: &GpuRequest, want: &GpuRequest) -> Vec<(Option<String>, u32, Option<String>)> {
    let offers = cloud.broker().offers(asked).await.expect("a cloud that works shows its offers").offers;
    let selected = market::select(offers, want, &Work::default()).map_or_else(|_| Vec::new(), |found| found.offers);
    selected.into_iter().map(|offer| (offer.gpu_raw, offer.gpu_count, offer.region)).collect()
}

/// A cloud without offers is not an error.
pub async fn may_be_none(cloud: &FakeCloud) {
    cloud.state().stock.clear();
    let offers = cloud.broker().offers(&want()).await.expect("nothing is an answer too");
    assert_eq!(offers.offers, []);
}

/// With an invalid key nothing is rented and no request is sent.
pub async fn of_others_are_refused(cloud: &FakeCloud) {
    let broker = cloud.broker();
    for key in ["", "{}", "null", "../../instances", "{\"x\": 1}"] {
        let offer = Offer::new("elsewhere", key.to_owned(), 1, Default::default());
        let made = broker.create(&offer, &lease()).await;
        assert_eq!(kind(&made), Some(BrokerErrorKind::Rejected), "{key:?}: {made:?}");
    }
    assert_eq!(cloud.state().count(Op::Create), 0);
}

/// A thousand offers are read.
pub async fn may_be_many(cloud: &FakeCloud) {
    let plain = Stock::mixed()[0].clone();
    cloud.state().stock = (0..1000).map(|at| many(&plain, at)).collect();
    let listed = cloud.broker().offers(&want()).await.expect("they are read");
    assert!(!listed.offers.is_empty());
}

fn many(plain: &Stock, at: i64) -> Stock {
    let price = UsdPerHour(plain.price.0 + Usd::from_micros(at * 10_000));
    Stock { id: (2000 + at).to_string(), price, ..plain.clone() }
}

fn shown(cloud: &FakeCloud) -> Vec<Stock> {
    let stock = cloud.state().stock.clone();
    let shown: Vec<Stock> = stock.iter().filter_map(|stock| cloud.dialect().shows(stock)).collect();
    assert!(shown.iter().any(Stock::is_plain), "every cloud has something");
    shown
}

async fn offers(cloud: &FakeCloud, stock: &Stock, spot: bool) -> Offers {
    let want = GpuRequest { gpu_count: Some(stock.gpus), spot, ..want() };
    cloud.broker().offers(&want).await.expect("a cloud that works shows its offers")
}

fn assert_about(told: Option<Bytes>, gib: Option<u64>, what: &str, offer: &Offer) {
    let about = |told: Bytes, gib: u64| (told.gib() / gib as f64 - 1.0).abs() < ROUNDING;
    match (told, gib) {
        (Some(told), Some(gib)) if about(told, gib) => {}
        (None, None) => {}
        _ => panic!("{what} is {told:?}, {gib:?} GiB is right: {offer:?}"),
    }
}
